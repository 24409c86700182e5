"""Models as chains of segments. Parameter names are Hugging Face's; nothing here knows an optimizer or the engine."""
