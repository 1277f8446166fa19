"""Ship it: from a run of `train_qlora` to files that answer somewhere else, and the proof that they answer alike.

trained_run.py     what a run's folder says: base, data, numbers of bits, adapter
new_folder.py      a folder that is there as a whole or not at all; is there room for it
merged_weights.py  the trained model's weights, one at a time: as rounded in training, and the adapter added
checkpoint.py      `--as merged`: safetensors in shards, for transformers, vLLM and others
architectures.py   model shapes that llama.cpp knows: its names for tensors and settings
vocabulary.py      tokens, their types, pre-tokenizer, end tokens and chat template, as llama.cpp wants them
gguf_files.py      `--as gguf` and `--as base`, and `--as adapter` for beside that base
go_template.py     a chat template in Ollama's language, which is Go's
papers.py          Modelfile, model card, the line to run each thing with
llama_cpp.py       a real llama.cpp in this process (PyPI's xllamacpp)
check.py           `--check`: the file's answers beside the trained model's, and where they part

`python -m qlora_lab.export RUN --to FOLDER` is the command.
"""
