"""The model in other libraries. Each adapter is an extra, and nothing outside this package imports any of them.

    transformers   configuration, models and tokenizer for transformers; a Trainer that carries memories
    export         turns a run, or what `save_pretrained` wrote, into a folder that transformers loads
    onnx           the model as two ONNX graphs for onnxruntime, with memories and states as inputs and outputs
    lm_eval        the model in lm-evaluation-harness, and its command line
"""
