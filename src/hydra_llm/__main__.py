"""`python -m hydra_llm` is the command `hydra-llm`."""

from hydra_llm.cli.main import main

if __name__ == "__main__":
    main()
