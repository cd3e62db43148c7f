"""`python -m resect` is the command line."""

from resect.cli import main

if __name__ == "__main__":
    main()
