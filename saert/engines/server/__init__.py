"""`saert serve`: an OpenAI-compatible server whose requests take edits of their own.

    app        routes               batching   the engine over transformers: one thread, one batch
    schema     what may be asked    padded     its key-value cache
    jobs       a request as a job   sampling   its draws
    answers    what comes back      engine     what the server asks of any engine
    shelf      the SAEs             monitors   latents that are watched
    vllm_*     the engine over vLLM: its requests, their steps and codes, its start, its workers

Needs `pip install 'saert[serve]'`; nothing here is imported before the command is.
"""
