"""What every room stands on: files that appear whole, addresses and keys, memory budgets, logs."""
