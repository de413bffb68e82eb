from hydra_llm.extras import require

require("bench", "the benchmark")
