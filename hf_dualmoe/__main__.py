"""`python -m hf_dualmoe`: the same as the command `hf-dualmoe`."""

from .cli.main import main

if __name__ == "__main__":
    main()
