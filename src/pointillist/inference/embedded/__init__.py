"""The embedded engine and its server: the default on a machine without vLLM, and the measure of what vLLM must do."""
