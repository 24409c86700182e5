"""Conversations to tokens that say what is trained: formats, chat templates, masks, shards of them, packing."""
