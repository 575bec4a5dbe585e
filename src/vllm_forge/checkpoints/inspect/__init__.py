"""What a checkpoint is, and what each line's vLLM would make of it; headers only."""
