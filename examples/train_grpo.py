"""GRPO on needle tasks over long contexts, on Megatron's own engine.

    torchrun --standalone --nproc-per-node 2 -m megatron_longact.run --cpu examples/train_grpo.py --longact ...

`examples/demo/run.sh` is a complete command. Without `--longact` every row of Q and K trains. `longact train` is the
same program.
"""

from megatron_longact.rl.train import main

if __name__ == "__main__":
    main()
