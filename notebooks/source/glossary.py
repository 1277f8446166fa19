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
# | **all-gather** | An exchange after which every card has the shares of all cards. | [dive G](dive_g_more_than_one_card.ipynb) |
# | **Alpaca** | A layout of data: each sample has an instruction, often an input that it is about, and the output wanted. | [lesson 08](08_your_data.ipynb) |
# | **alpha** | A setting of LoRA: the product of the two thin matrices is multiplied by alpha divided by the rank. | [lesson 06](06_lora.ipynb) |
# | **autocast** | A mode of PyTorch in which matrix products round their inputs to bf16, while the weights stay in float32. | [dive F](dive_f_why_is_it_slow.ipynb) |
# | **backward pass** | The way back from the loss through the layers, each of which hands a gradient on to the one before. | [lesson 02](02_memory_wall.ipynb) |
# | **bandwidth** | How many bytes a second a memory can read or write. | [dive F](dive_f_why_is_it_slow.ipynb) |
# | **base model** | The model beside which an adapter is trained; its own weights stay as they are. | [lesson 01](01_first_run.ipynb) |
# | **batch** | The samples that a model computes at once. | [lesson 02](02_memory_wall.ipynb) |
# | **bf16 (bfloat16)** | A format of numbers with 16 bits: as wide a range as float32, with fewer digits. Recent GPUs and some CPUs multiply it themselves. | [lesson 00](00_start_here.ipynb) |
# | **bits per parameter** | What a weight really takes: the bits of its code, and its share of the scale (and of other constants) of its block. | [lesson 03](03_number_formats.ipynb) |
# | **block** | Neighbouring numbers of a tensor, often {{64}}, that share a scale. | [lesson 03](03_number_formats.ipynb) |
# | **chat template** | The text with which a model marks who speaks in a conversation. It comes with the model's tokenizer. | [lesson 08](08_your_data.ipynb) |
# | **checkpoint** | All that is needed to go on with a training: the adapter, the optimizer's averages, and the place in schedule, random numbers and data; in general, any saved file of a model's weights. | [lesson 09](09_your_gpu.ipynb) |
# | **clipping** | Scaling all gradients of a step down by one factor where their common norm is above a limit. | [dive D](dive_d_training_tricks.ipynb) |
# | **code** | The small integer that stands for a number after it was quantized. | [lesson 03](03_number_formats.ipynb) |
# | **codebook** | The list of a format's levels, such as NF4's sixteen. | [lesson 04](04_nf4.ipynb) |
# | **compute dtype** | The format in which the layers multiply. Which one is fast depends on the machine. | [lesson 01](01_first_run.ipynb) |
# | **CUDA context** | Memory that the GPU's driver takes before the first tensor, about half a GB. | [lesson 02](02_memory_wall.ipynb) |
# | **CUDA graph** | A recording of the launches of many kernels, which one call replays. | [dive F](dive_f_why_is_it_slow.ipynb) |
# | **data parallel** | Several cards hold the whole model each, take their own samples, and add up their gradients. | [dive G](dive_g_more_than_one_card.ipynb) |
# | **decoy** | Something in a text that does not belong into the answer, such as a number that is taken back. | [lesson 01](01_first_run.ipynb) |
# | **dense** | Held as ordinary floating-point numbers, one for each weight, not as codes and scales. | [lesson 07](07_qlora_from_scratch.ipynb) |
# | **dequantize** | To turn codes and scales back into ordinary numbers: rounded ones, not the original ones. | [lesson 07](07_qlora_from_scratch.ipynb) |
# | **dequantized, requantized, pristine merge** | The adapter added to what the {{4}}-bit weights stand for (kept in {{16}} bits, or rounded to {{4}} bits again), or to the checkpoint's own {{16}}-bit weights. | [lesson 12](12_ship_it.ipynb) |
# | **double quantization** | Storing the scales of the blocks in fewer bits, too. | [lesson 05](05_double_quantization.ipynb) |
# | **dropout** | In every training step a random share of a layer's inputs is set to zero, so that the layer does not rely on any single one. | [lesson 09](09_your_gpu.ipynb) |
# | **dynamic code** | Bitsandbytes' eight bits for scales: half of its levels lie within a tenth of zero, the others are wider apart than INT8's. | [lesson 05](05_double_quantization.ipynb) |
# | **embeddings** | A vector for each token that the model knows. QLoRA does not quantize them. | [lesson 01](01_first_run.ipynb) |
# | **end token** | The token that says that an answer is over. A model stops only if it has learned it. | [lesson 08](08_your_data.ipynb) |
# | **entropy** | How many bits the codes are worth: {{4}} if all sixteen are equally frequent, less if some are rare. | [lesson 04](04_nf4.ipynb) |
# | **epoch** | One pass of the training over all its samples. | [lesson 09](09_your_gpu.ipynb) |
# | **FLOP/s** | Floating-point operations, such as one multiplication or addition, that a machine does in a second. | [lesson 09](09_your_gpu.ipynb) |
# | **forward pass** | The way from the input through the layers to the model's scores. | [lesson 02](02_memory_wall.ipynb) |
# | **fp16 (float16)** | A format of numbers with 16 bits: more digits than bf16, but a much smaller range. | [lesson 09](09_your_gpu.ipynb) |
# | **frozen** | Not changed by the training. | [lesson 01](01_first_run.ipynb) |
# | **fused kernel** | One kernel that does the work of several, so that what is in between never goes to memory. | [dive F](dive_f_why_is_it_slow.ipynb) |
# | **GGUF** | The file format of llama.cpp, which holds a model in one of several number formats. | [lesson 12](12_ship_it.ipynb) |
# | **global batch** | The samples of all cards in a step. | [dive G](dive_g_more_than_one_card.ipynb) |
# | **gradient** | For each weight one number, left by the backward pass: how the loss changes with that weight. | [lesson 02](02_memory_wall.ipynb) |
# | **gradient checkpointing** | Keeping only the input of each layer, and computing its other activations again in the backward pass: less memory, more time. | [lesson 02](02_memory_wall.ipynb) |
# | **held-out** | Kept away from the training, to judge the model with. | [lesson 08](08_your_data.ipynb) |
# | **hybrid sharding** | The cards of one host share the model, and the hosts are data parallel to each other. | [dive G](dive_g_more_than_one_card.ipynb) |
# | **inference** | Using a model that is trained, rather than training it. | [lesson 13](13_fact_check.ipynb) |
# | **INT4, INT8** | Integer codes of {{4}} or 8 bits, with a scale that many numbers share. | [lesson 03](03_number_formats.ipynb) |
# | **interval** | A range around a measured mean, made so that in {{95}} of {{100}} experiments it holds the true value. | [lesson 11](11_accuracy_comparison.ipynb) |
# | **kernel** | A small program that a GPU runs on many numbers at once, such as a matrix product or an addition; a notebook's kernel is another thing, the Python process behind it. | [dive F](dive_f_why_is_it_slow.ipynb) |
# | **learning rate** | How far the optimizer moves each weight in a step, roughly. | [lesson 01](01_first_run.ipynb) |
# | **level** | One of the (at most sixteen) numbers between minus one and one that a 4-bit code can stand for. | [lesson 04](04_nf4.ipynb) |
# | **linear layer** | A layer that multiplies its input by a matrix of weights; nearly all weights of a language model are in such layers. | [lesson 02](02_memory_wall.ipynb) |
# | **llama.cpp** | A program that runs models from GGUF files, also without a GPU. | [lesson 12](12_ship_it.ipynb) |
# | **logits** | The scores that a model gives at each token, one for each entry of its vocabulary. | [lesson 02](02_memory_wall.ipynb) |
# | **LoRA** | Low-rank adaptation: the weight stays frozen, and the product of two thin matrices is trained beside it. | [lesson 06](06_lora.ipynb) |
# | **loss** | Minus the natural logarithm of the probability that the model gave to the right next token, averaged over the tokens that it should write. | [lesson 01](01_first_run.ipynb) |
# | **loss scaler** | Multiplies the loss before the backward pass, so that small gradients do not become zero in fp16. | [dive L](dive_l_small_cards.ipynb) |
# | **merge** | To add the adapter to the weights that it was trained beside, so that one model is left. | [lesson 12](12_ship_it.ipynb) |
# | **merge-aware training** | Training in which the forward pass already uses each weight as it will be after the merge into {{4}} bits, so that what is learned survives that merge. | [dive H](dive_h_merging.ipynb) |
# | **micro-batch** | The samples of one forward and backward pass; a step may add up the gradients of several. | [dive D](dive_d_training_tricks.ipynb) |
# | **NaN** | Not a number: what a computation gives that has no result, such as infinity minus infinity. | [lesson 09](09_your_gpu.ipynb) |
# | **nat** | The unit of the loss, because its logarithm is the natural one. | [lesson 01](01_first_run.ipynb) |
# | **NF4** | NormalFloat in four bits: sixteen levels that suit the weights of language models; a 4-bit code names one of them. | [lesson 04](04_nf4.ipynb) |
# | **nibble** | One of the two 4-bit codes in a byte. | [lesson 04](04_nf4.ipynb) |
# | **norm (of gradients)** | The root of the sum of the squares of all gradients. | [dive D](dive_d_training_tricks.ipynb) |
# | **NVLink** | NVIDIA's direct wires between the cards of one computer. | [dive G](dive_g_more_than_one_card.ipynb) |
# | **Ollama** | A friendlier shell around llama.cpp; its recipe for a model is a file called Modelfile. | [lesson 12](12_ship_it.ipynb) |
# | **optimizer** | The rule by which a step changes the weights according to their gradients, such as Adam. | [lesson 02](02_memory_wall.ipynb) |
# | **optimizer states** | What the optimizer remembers from step to step: Adam keeps two running averages for each weight, of its gradients and of their squares. | [lesson 02](02_memory_wall.ipynb) |
# | **outlier** | A value that is far larger than those beside it, and so sets their common scale. | [lesson 03](03_number_formats.ipynb) |
# | **packing** | Putting several samples into one row of a batch, instead of filling it up with padding. | [dive D](dive_d_training_tricks.ipynb) |
# | **paged optimizer** | An optimizer whose states lie in memory that the driver can move to the CPU when the card is full. | [lesson 02](02_memory_wall.ipynb) |
# | **pairing** | Comparing two methods at the same seed and subtracting, so that the luck that both had cancels out. | [lesson 11](11_accuracy_comparison.ipynb) |
# | **peak** | The moment of a training step at which most memory is taken. | [lesson 02](02_memory_wall.ipynb) |
# | **PEFT** | Hugging Face's library for LoRA and its relatives. Its files are what most programs read. | [lesson 06](06_lora.ipynb) |
# | **perplexity** | e to the power of the loss: among how many equally likely tokens the model seems to choose. | [lesson 08](08_your_data.ipynb) |
# | **pipeline** | The first layers are on one card and the next ones on another, and what comes out of the one is handed on to the other. | [dive G](dive_g_more_than_one_card.ipynb) |
# | **profiler** | A tool that notes when each kernel begins and ends, and slows the program down while it watches. | [dive F](dive_f_why_is_it_slow.ipynb) |
# | **Q8_0, Q4_0** | GGUF's formats with {{8}} or {{4}} bits for each weight and one {{16}}-bit scale for each block of {{32}} weights. | [lesson 12](12_ship_it.ipynb) |
# | **QLoRA** | Training a LoRA adapter beside a frozen model whose weights are stored in 4 bits. | [lesson 07](07_qlora_from_scratch.ipynb) |
# | **quantile** | The quantile of {{0.9}}, for example, is the number that {{90}} % of a distribution lie below. | [lesson 04](04_nf4.ipynb) |
# | **quantization** | Storing numbers in fewer bits each, such as {{4}} instead of {{16}}. | [lesson 03](03_number_formats.ipynb) |
# | **rank** | How many products of a column and a row a matrix is the sum of. LoRA's r. | [lesson 06](06_lora.ipynb) |
# | **reduce-scatter** | An exchange that adds up what all cards have, and leaves each card its own part of the sums. | [dive G](dive_g_more_than_one_card.ipynb) |
# | **relative error** | The root mean square (RMS) of the errors divided by that of the numbers: zero is perfect, one is as bad as zeros everywhere. | [lesson 03](03_number_formats.ipynb) |
# | **replay** | Mixing samples of what a model should keep into what it is trained on. | [lesson 08](08_your_data.ipynb) |
# | **roofline** | A picture of the speed that a kernel can reach, over its operations for each byte: on the slope the memory limits it, on the flat part the computing does. | [dive F](dive_f_why_is_it_slow.ipynb) |
# | **rounding** | Putting the nearest number that a format has in a number's place. | [lesson 03](03_number_formats.ipynb) |
# | **scale** | The distance between two marks of a quantized block, stored once for all its numbers: code times scale gives the number back; LoRA's scale is another thing, its factor alpha / r. | [lesson 03](03_number_formats.ipynb) |
# | **second-level scale** | The float32 that {{256}} scales share when they are stored in eight bits. | [lesson 05](05_double_quantization.ipynb) |
# | **seed** | The number that decides how an adapter begins and in which order the samples come. Another seed is another try of the same training. | [lesson 11](11_accuracy_comparison.ipynb) |
# | **sharded (FSDP)** | Each card keeps only its share of every layer, and gathers the others' shares for the moment when the layer computes. | [dive G](dive_g_more_than_one_card.ipynb) |
# | **ShareGPT** | A layout of data: each sample is a list of turns of a conversation, each with who speaks and what is said. | [lesson 08](08_your_data.ipynb) |
# | **shingles** | All groups of three words in a row that a text has; two texts that share most of them are nearly the same. | [lesson 08](08_your_data.ipynb) |
# | **singular value** | How large one of the products of a column and a row is, of which a matrix is the sum. | [dive B](dive_b_why_low_rank.ipynb) |
# | **spread** | How far a single value typically is from the mean, also called the standard deviation. | [lesson 11](11_accuracy_comparison.ipynb) |
# | **standard error** | How far the mean of several values is typically off the true mean: their spread divided by the square root of their number. | [dive C](dive_c_small_differences.ipynb) |
# | **straight-through estimator** | A rule for the backward pass through a rounding: act as if the rounding were not there, because its own slope is zero nearly everywhere. | [dive H](dive_h_merging.ipynb) |
# | **system message** | A message before the first turn of a conversation that tells the model its task. | [lesson 08](08_your_data.ipynb) |
# | **targets** | The layers that get an adapter, by name. | [lesson 06](06_lora.ipynb) |
# | **token** | A word or a part of one: the unit in which a model reads and writes text. | [lesson 01](01_first_run.ipynb) |
# | **token F1** | A score of free text, from {{0}} to {{1}}: how many words an answer and its reference share. | [lesson 08](08_your_data.ipynb) |
# | **tokenizer** | What cuts a text into tokens and gives the number of each. | [lesson 08](08_your_data.ipynb) |
# | **Triton** | A compiler that makes GPU kernels of Python functions. | [dive F](dive_f_why_is_it_slow.ipynb) |
# | **unmerge** | To take a merged adapter off a weight again, by subtracting it or by putting the old weight back. | [dive H](dive_h_merging.ipynb) |
# | **update** | What training adds to a weight: the weight afterwards minus the weight before. | [lesson 06](06_lora.ipynb) |
# | **validation** | Measuring the loss on held-out samples while the model trains, to see when more training stops helping. | [lesson 08](08_your_data.ipynb) |
# | **verdict (of --check)** | Whether an exported file answers as the trained model does: equal, lossy or broken. It does not say whether the model is good. | [lesson 12](12_ship_it.ipynb) |
# | **vLLM** | A server for GPUs that answers many requests at once. | [lesson 12](12_ship_it.ipynb) |
# | **vocabulary** | All the tokens that a model knows. | [lesson 00](00_start_here.ipynb) |
# | **warm-up** | The learning rate rises over the first steps, until Adam's averages mean something. | [dive D](dive_d_training_tricks.ipynb) |
# | **weight** | One of the numbers by which a model multiplies; what it has learned is in them. | [lesson 00](00_start_here.ipynb) |
# | **zero point** | The code of zero in affine quantization, or what stands for it: a second constant of each block. | [lesson 05](05_double_quantization.ipynb) |
#
# **Next:** back to [the map](00_start_here.ipynb).
