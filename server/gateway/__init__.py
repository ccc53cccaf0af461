"""A request's way to vLLM and its answer's way back."""
