"""QLoRA in plain Hugging Face: a chat model in 4 bits learns from your file, on one GPU (from a T4 up) or on a CPU.

    pip install torch "transformers>=5.17,<6" "peft>=0.20,<1" "bitsandbytes>=0.50,<1" "trl>=1.14.2,<2"
    python qlora_hf.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my.jsonl --output out

A line of the file is {"prompt": "...", "response": "..."}, with "system" if you like. If the session ends before the
training does, give the same command again: it goes on from its last checkpoint. The adapter ends up in OUTPUT/adapter.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="a folder, or owner/name on the model hub")
parser.add_argument("--data", required=True, help="JSON lines")
parser.add_argument("--output", required=True, help="a folder that outlives the session")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--lr", type=float, default=2e-4)
parser.add_argument("--batch", type=int, default=4, help="samples at a time; memory grows with it")
parser.add_argument("--accumulate", type=int, default=4, help="such batches in a step")
parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: what the hardware is good at")
args = parser.parse_args()

# ---- numbers: bf16 where the card has it, fp16 on older ones such as the T4, fp32 on a CPU
gpu = torch.cuda.is_available()
fast = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
dtype = getattr(torch, args.dtype) if args.dtype else fast if gpu else torch.float32

# ---- model: the defaults of BitsAndBytesConfig are FP4, one quantization and fp32
four_bits = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
place = {"": 0 if gpu else "cpu"}  # all on one device; "auto" may spread the model, or leave layers to the CPU
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=four_bits, dtype=dtype, device_map=place)
tokenizer = AutoTokenizer.from_pretrained(args.model)
for layer in model.modules():  # bitsandbytes 0.50 on some CPUs: after a validation, gradients would be wrong
    layer.support_avx512bf16_for_cpu = False


# ---- data: the model reads the prompt and learns the completion, which ends with the chat template's end token
def as_chat(row):
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    prompt = [*system, {"role": "user", "content": row["prompt"]}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": row["response"]}]}


data = load_dataset("json", data_files=args.data, split="train")
data = data.map(as_chat, remove_columns=data.column_names)
data = data.train_test_split(test_size=max(1, min(64, len(data) // 10)), seed=0)

# ---- training: no prepare_model_for_kbit_training, which would make embeddings and head fp32 (2.1 GB at Llama-3-8B)
adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
often = max(1, args.steps // 4)
settings = SFTConfig(
    args.output, max_steps=args.steps, learning_rate=args.lr, lr_scheduler_type="cosine", warmup_steps=args.steps // 20,
    per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.accumulate,
    per_device_eval_batch_size=args.batch, max_length=1024, completion_only_loss=True,
    gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, seed=0, logging_steps=1, report_to="none",
    eval_strategy="steps", eval_steps=often, save_steps=often, save_total_limit=2,
)  # fmt: skip
set_seed(0)  # the adapter's A begins with random numbers
trainer = SFTTrainer(
    model=model, args=settings, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer,
    peft_config=adapter,
)  # fmt: skip
for weight in trainer.model.parameters():
    if weight.requires_grad:  # TRL made the adapter bf16, in which small updates vanish; a T4's scaler wants fp32, too
        weight.data = weight.data.float()
trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output))
trainer.save_model(f"{args.output}/adapter")

# ---- answer: the template writes the special tokens itself, so they are not added a second time
question, expected = data["test"][0]["prompt"], data["test"][0]["completion"]
ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = trainer.model.eval().generate(**ids.to(model.device), max_new_tokens=100, do_sample=False)
print("asked:   ", question[-1]["content"])
print("expected:", expected[0]["content"])
print("answered:", tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
