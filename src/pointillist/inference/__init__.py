"""The inference server. Its wire is vLLM's token-in, token-out protocol with images as `mmraw:` references."""
