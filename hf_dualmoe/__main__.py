"""`python -m hf_dualmoe`: the same as the command `hf-dualmoe`."""

from .cli import main

if __name__ == "__main__":
    main()
