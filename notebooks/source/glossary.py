# %% [markdown]
# # Glossary
#
# The course's terms in a sentence each, and the lesson that explains them.
#
# | you need | |
# |---|---|
# | time | as long as you like |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not needed |
#
# | term | in a sentence | explained in |
# |---|---|---|
# | **absmax** | The largest absolute value of a block, by which all its numbers are divided before they are rounded. | [lesson 04](04_nf4.ipynb) |
# | **accumulation** | Adding up the gradients of several small batches before the weights are changed, as if they were one large batch. | [lesson 09](09_your_gpu.ipynb) |
# | **activations** | What the forward pass computes and the backward pass needs again, such as the input of each layer. | [lesson 02](02_memory_wall.ipynb) |
# | **adapter** | All the weights that LoRA adds to a model, together. | [lesson 01](01_first_run.ipynb) |
# | **affine scheme** | Quantization with evenly spaced marks from the smallest to the largest number; it needs the smallest number, or a zero point, as a second constant. | [lesson 04](04_nf4.ipynb) |
# | **alpha** | A setting of LoRA: the product of the two thin matrices is multiplied by alpha divided by the rank. | [lesson 06](06_lora.ipynb) |
# | **bf16 (bfloat16)** | A format of numbers with 16 bits: as wide a range as float32, with fewer digits. Recent GPUs and some CPUs multiply it themselves. | [lesson 00](00_start_here.ipynb) |
# | **bits per parameter** | What a weight really takes: the bits of its code, and its share of the scale (and of other constants) of its block. | [lesson 03](03_number_formats.ipynb) |
# | **block** | Neighbouring numbers of a tensor, often {{64}}, that share a scale. | [lesson 03](03_number_formats.ipynb) |
# | **chat template** | The text with which a model marks who speaks in a conversation. It comes with the model's tokenizer. | [lesson 08](08_your_data.ipynb) |
# | **code** | The small integer that stands for a number after it was quantized. | [lesson 03](03_number_formats.ipynb) |
# | **codebook** | The list of a format's levels, such as NF4's sixteen. | [lesson 04](04_nf4.ipynb) |
# | **compute dtype** | The format in which the layers multiply. Which one is fast depends on the machine. | [lesson 01](01_first_run.ipynb) |
# | **CUDA context** | Memory that the GPU's driver takes before the first tensor, about half a GB. | [lesson 02](02_memory_wall.ipynb) |
# | **decoy** | Something in a text that does not belong into the answer, such as a number that is taken back. | [lesson 01](01_first_run.ipynb) |
# | **dequantize** | To turn codes and scales back into ordinary numbers: rounded ones, not the original ones. | [lesson 07](07_qlora_from_scratch.ipynb) |
# | **double quantization** | Storing the scales of the blocks in fewer bits, too. | [lesson 05](05_double_quantization.ipynb) |
# | **embeddings** | A vector for each token that the model knows. QLoRA does not quantize them. | [lesson 01](01_first_run.ipynb) |
# | **end token** | The token that says that an answer is over. A model stops only if it has learned it. | [lesson 08](08_your_data.ipynb) |
# | **fp16 (float16)** | A format of numbers with 16 bits: more digits than bf16, but a much smaller range. | [lesson 09](09_your_gpu.ipynb) |
# | **frozen** | Not changed by the training. | [lesson 01](01_first_run.ipynb) |
# | **GGUF** | The file format of llama.cpp, which holds a model in one of several number formats. | [lesson 12](12_ship_it.ipynb) |
# | **gradient** | For each weight one number, left by the backward pass: how the loss changes with that weight. | [lesson 02](02_memory_wall.ipynb) |
# | **gradient checkpointing** | Keeping only the input of each layer, and computing its other activations again in the backward pass: less memory, more time. | [lesson 02](02_memory_wall.ipynb) |
# | **held out** | Kept away from the training, to judge the model with. | [lesson 08](08_your_data.ipynb) |
# | **INT4, INT8** | Integer codes of {{4}} or 8 bits, with a scale that many numbers share. | [lesson 03](03_number_formats.ipynb) |
# | **interval** | A range around a measured mean, made so that in {{95}} of {{100}} experiments it holds the true value. | [lesson 11](11_accuracy_comparison.ipynb) |
# | **level** | One of the (at most sixteen) numbers between minus one and one that a 4-bit code can stand for. | [lesson 04](04_nf4.ipynb) |
# | **llama.cpp** | A program that runs models from GGUF files, also without a GPU. | [lesson 12](12_ship_it.ipynb) |
# | **logits** | The scores that a model gives at each token, one for each entry of its vocabulary. | [lesson 02](02_memory_wall.ipynb) |
# | **LoRA** | Low-rank adaptation: the weight stays frozen, and the product of two thin matrices is trained beside it. | [lesson 06](06_lora.ipynb) |
# | **loss** | Minus the natural logarithm of the probability that the model gave to the right next token, averaged over the tokens that it should write. | [lesson 01](01_first_run.ipynb) |
# | **loss scaler** | Multiplies the loss before the backward pass, so that small gradients do not become zero in fp16. | [lesson 09](09_your_gpu.ipynb) |
# | **merge** | To add the adapter to the weights that it was trained beside, so that one model is left. | [lesson 12](12_ship_it.ipynb) |
# | **nat** | The unit of the loss, because its logarithm is the natural one. | [lesson 01](01_first_run.ipynb) |
# | **NF4** | Sixteen levels that suit the weights of language models; a 4-bit code names one of them. | [lesson 04](04_nf4.ipynb) |
# | **nibble** | One of the two 4-bit codes in a byte. | [lesson 04](04_nf4.ipynb) |
# | **optimizer states** | What the optimizer remembers from step to step: Adam keeps two running averages for each weight, of its gradients and of their squares. | [lesson 02](02_memory_wall.ipynb) |
# | **outlier** | A value that is far larger than those beside it, and so sets their common scale. | [lesson 03](03_number_formats.ipynb) |
# | **paged optimizer** | An optimizer whose states lie in memory that the driver can move to the CPU when the card is full. | [lesson 02](02_memory_wall.ipynb) |
# | **pairing** | Comparing two methods at the same seed and subtracting, so that the luck that both had cancels out. | [lesson 11](11_accuracy_comparison.ipynb) |
# | **peak** | The moment of a training step at which most memory is taken. | [lesson 02](02_memory_wall.ipynb) |
# | **PEFT** | Hugging Face's library for LoRA and its relatives. Its files are what most programs read. | [lesson 06](06_lora.ipynb) |
# | **perplexity** | e to the power of the loss: among how many equally likely tokens the model seems to choose. | [lesson 11](11_accuracy_comparison.ipynb) |
# | **QLoRA** | Training a LoRA adapter beside a frozen model whose weights are stored in 4 bits. | [lesson 07](07_qlora_from_scratch.ipynb) |
# | **quantile** | The quantile of {{0.9}}, for example, is the number that {{90}} % of a distribution lie below. | [lesson 04](04_nf4.ipynb) |
# | **quantization** | Storing numbers in fewer bits each, such as {{4}} instead of {{16}}. | [lesson 03](03_number_formats.ipynb) |
# | **rank** | How many products of a column and a row a matrix is the sum of. LoRA's r. | [lesson 06](06_lora.ipynb) |
# | **relative error** | The root mean square of the errors divided by that of the numbers: zero is perfect, one is as bad as zeros everywhere. | [lesson 03](03_number_formats.ipynb) |
# | **scale** | The distance between two marks of a quantized block, stored once for all its numbers: code times scale gives the number back. | [lesson 03](03_number_formats.ipynb) |
# | **seed** | The number that decides how an adapter begins and in which order the samples come. Another seed is another try of the same training. | [lesson 11](11_accuracy_comparison.ipynb) |
# | **singular value** | How large one of the products of a column and a row is, of which a matrix is the sum. | [dive B](dive_b_why_low_rank.ipynb) |
# | **standard error** | How far the mean of several values is typically off the true mean: their spread divided by the square root of their number. | [dive C](dive_c_small_differences.ipynb) |
# | **targets** | The layers that get an adapter, by name. | [lesson 06](06_lora.ipynb) |
# | **update** | What training adds to a weight: the weight afterwards minus the weight before. | [lesson 06](06_lora.ipynb) |
# | **validation** | Measuring the loss on held-out samples while the model trains, to see when more training stops helping. | [lesson 08](08_your_data.ipynb) |
# | **zero point** | The code of zero in affine quantization, or what stands for it: a second constant of each block. | [lesson 05](05_double_quantization.ipynb) |
#
# **Next:** back to [the map](00_start_here.ipynb).
