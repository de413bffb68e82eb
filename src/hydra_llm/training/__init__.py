from hydra_llm.extras import require

require("learn", "learning")
