"""Attached SAEs in engines that batch many requests: vLLM, SGLang, and the server over them.

Every request brings its own edits as plain data (`directive`), which the worker turns into a row of
a static table (`rows`); a tap on the module finds each token's row and edits it (`taps`).
"""
