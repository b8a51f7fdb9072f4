"""Claims about speed and memory, each as a ratio measured side by side in one run."""
