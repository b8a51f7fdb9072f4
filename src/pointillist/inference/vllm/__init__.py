"""Production inference: a stock vLLM server that reads references and follows the trainer's weights. Needs vLLM."""
