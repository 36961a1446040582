"""`python -m graphtune` is the command `graphtune`; so are the processes that torchrun starts."""

from graphtune.cli import main

if __name__ == "__main__":
    main()
