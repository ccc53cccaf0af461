"""Personal data in a prompt: found in its text, told as ranges of its tokens."""
