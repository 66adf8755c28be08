"""Runs a vision-language model in two halves: ``encoder`` runs the vision tower, ``language`` the decoder.

families/      the differences between models, one file for each family
checkpoint     loads the tensors of one half from a model's files
shape          the kind and size of a media item, without its pixels
media          pictures and videos → patches and their number of tokens
encoder        patches → embedding, with the fields of ``embedding``
cache          embeddings kept by content
prompt         messages → token ids, positions, and where the visual tokens are
language       runs the chunks and tokens of one sequence, with ``sampling``, ``choice`` and ``text``
grammar        answers of a given form: JSON schema, regular expression, list of texts
whole_prompt   a prompt as rows of embeddings, text included, for the origin's wire
scheduler      runs many sequences in turn, with the interface to embeddings that arrive in parts
reference      the undivided model, whose results the halves must equal bit by bit
device         tensors in device memory as fields of a transfer
progress       lines about a step that takes long
errors         errors of the engine
"""
