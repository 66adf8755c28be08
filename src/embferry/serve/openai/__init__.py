"""OpenAI's chat completions API, as far as it is supported: requests, completions, chunks and errors."""
