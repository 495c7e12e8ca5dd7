"""`python -m gatedffn`, which `torchrun -m gatedffn` needs."""

from gatedffn.cli import main

if __name__ == "__main__":
    main()
