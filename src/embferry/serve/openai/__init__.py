"""The part of OpenAI's chat completions API that is served: requests in, completions, chunks and errors out."""
