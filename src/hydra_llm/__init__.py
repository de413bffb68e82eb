"""hydra-llm personalizes any black-box LLM (HYDRA, Zhuang et al., NeurIPS 2024)."""

__version__ = "0.1.0"
