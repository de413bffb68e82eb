from hydra_llm.extras import require

require("server", "the gateway")
