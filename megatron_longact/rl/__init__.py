"""Reinforcement learning on Megatron's own training step, with LongAct: tasks, rollouts, objective, outer loop."""
