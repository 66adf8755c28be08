"""The receive pool: blocks, buffers, and the admission of transfers to them."""
