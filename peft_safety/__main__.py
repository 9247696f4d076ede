"""`python -m peft_safety` is `peft-safety`."""

from peft_safety.cli import main

if __name__ == "__main__":
    main()
