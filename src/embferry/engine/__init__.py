"""Runs a vision-language model, split: ``encoder`` has the vision tower, ``language`` the decoder.

families/      what differs between models, one file a family
checkpoint     one half's tensors out of a model's files
shape          an item without its pixels
media          pictures and videos → patches; how many tokens they will be
encoder        patches → embedding, with the fields of ``embedding``
cache          embeddings kept by content
prompt         messages → token ids, positions, places of the visual tokens
schedule       where prefill is cut into chunks
source         the seam to the transfer: rows that arrive little by little
language       chunks and tokens of one sequence, with ``sampling`` and ``text``
scheduler      many sequences in turn
reference      the undivided model, which all this has to equal
"""
