"""The frozen language model: loading, prompting, sizes, LoRA, output head, sharding."""
