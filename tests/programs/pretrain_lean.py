"""`pretrain_plain.py` for runs that save: a checkpoint's writers import the program again, and this one quickly."""

if __name__ == "__main__":
    import pretrain_plain

    pretrain_plain.main()
