"""`python -m shardproof` is the command `shardproof`."""

from shardproof.cli.main import main

if __name__ == "__main__":
    main()
