"""`python -m promoe_triton`: the command where nothing is installed."""

from promoe_triton.cli import main

if __name__ == "__main__":
    main()
