"""`python -m unpoison` is `unpoison`."""

from unpoison.cli.main import main

if __name__ == "__main__":
    main()
