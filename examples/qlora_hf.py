"""QLoRA in plain Hugging Face: a chat model in 4 bits learns from your file, on one GPU (from a T4 up) or on a CPU.

    pip install torch "transformers>=5.17,<6" "peft>=0.20,<1" "bitsandbytes>=0.50,<1" "trl>=1.14.2,<2"
    python qlora_hf.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my.jsonl --output out --lr 2e-3

A line of the file is {"prompt": "...", "response": "..."}, with "system" if you like, and with other columns. Or it is
a CSV file, whose first line names these columns. If the session ends before the training does, give the same command
again: it goes on from its last checkpoint. OUTPUT/adapter is the adapter with the lowest validation loss,
OUTPUT/answers.jsonl what it answers to questions that it has not seen.
"""

import argparse
import csv
import json
import random
from collections import Counter

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="a chat model: a folder, or owner/name on the model hub")
parser.add_argument("--data", required=True, help="JSON lines, or CSV")
parser.add_argument("--output", required=True, help="a folder that outlives the session")
parser.add_argument("--split-by", default="prompt", help="a column: rows with the same value are never parted")
parser.add_argument("--max-length", type=int, default=1024, help="tokens; longer samples are left out")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--every", type=int, default=25, help="so many steps to the next validation and checkpoint")
parser.add_argument("--lr", type=float, default=2e-4)
parser.add_argument("--batch", type=int, default=4, help="samples at a time; memory grows with it")
parser.add_argument("--accumulate", type=int, default=4, help="such batches in a step")
parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: what the hardware is good at")
parser.add_argument("--merge", action="store_true", help="do not train: merge OUTPUT/adapter, into OUTPUT/merged")
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
for layer in model.modules():  # avoids a fault of bitsandbytes 0.50: on some CPUs, wrong gradients after a validation
    layer.support_avx512bf16_for_cpu = False
packed = sum(weight.nbytes for weight in model.parameters() if weight.dtype == torch.uint8)
print(f"in 4 bits: {packed / 1e6:,.0f} of the model's {model.get_memory_footprint() / 1e6:,.0f} MB")

# ---- merge: add the adapter to what the 4-bit weights stand for, beside which it was trained, and keep 16 bits
if args.merge:
    merged = PeftModel.from_pretrained(model.dequantize(), f"{args.output}/adapter").merge_and_unload()
    merged.to(torch.bfloat16 if dtype == torch.float32 else dtype).save_pretrained(f"{args.output}/merged")
    tokenizer.save_pretrained(f"{args.output}/merged")
    print(f"merged: {args.output}/merged")
    raise SystemExit

# ---- data: the model reads the prompt and learns the completion, which ends with the chat template's end token
if args.data.lower().endswith(".csv"):  # every cell is text, as it stands; the first line shows what parts the columns
    with open(args.data, newline="", encoding="utf-8-sig") as file:
        lines = file.readlines()
    rows = Dataset.from_list(list(csv.DictReader(lines, delimiter=max(",;\t", key=lines[0].count))))
else:
    rows = load_dataset("json", data_files=args.data, split="train")


def as_chat(row):
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    prompt = [*system, {"role": "user", "content": row["prompt"]}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": row["response"]}]}


def fits(chat):
    ids = tokenizer.apply_chat_template(chat["prompt"] + chat["completion"], return_dict=True)["input_ids"]
    return len(ids) <= args.max_length


# ---- split: a fifth of the groups to test on, a tenth to validate on; the same file is always split the same way
groups = [str(group) for group in rows[args.split_by]]
names = sorted(set(groups))
random.Random(0).shuffle(names)
tests, validations = (max(1, min(50, round(share * len(names)))) for share in (0.2, 0.1))
part_of = dict.fromkeys(names[:tests], "test") | dict.fromkeys(names[tests : tests + validations], "validation")
data = {}
for part in ("train", "validation", "test"):
    chosen = rows.select([i for i, group in enumerate(groups) if part_of.get(group, "train") == part])
    chats = chosen.map(as_chat, remove_columns=rows.column_names)
    data[part] = chats.filter(fits)
    print(f"{part}: {len(data[part])} samples, {len(chats) - len(data[part])} more were too long")

# ---- training: no prepare_model_for_kbit_training, which would make embeddings and head fp32 (2.1 GB at Llama-3-8B)
adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
settings = SFTConfig(
    args.output, max_steps=args.steps, learning_rate=args.lr,
    lr_scheduler_type="cosine", warmup_steps=args.steps // 20,  # the rate rises for a twentieth, then falls to zero
    per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.accumulate,
    per_device_eval_batch_size=args.batch, max_length=args.max_length, completion_only_loss=True,
    gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},  # torch's newer way
    bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, seed=0, logging_steps=1, report_to="none",
    eval_strategy="steps", eval_steps=args.every, save_steps=args.every, save_total_limit=2,
    load_best_model_at_end=True, metric_for_best_model="eval_loss",  # else the last one is saved
)  # fmt: skip
set_seed(0)  # the adapter's A begins with random numbers
trainer = SFTTrainer(
    model=model, args=settings, train_dataset=data["train"], eval_dataset=data["validation"],
    processing_class=tokenizer, peft_config=adapter,
)  # fmt: skip
for weight in trainer.model.parameters():
    if weight.requires_grad:  # TRL made the adapter bf16, in which small updates vanish; a T4's scaler wants fp32, too
        weight.data = weight.data.float()

# ---- look: the first sample as the model gets it, token by token, and whether the end of an answer is learned
batch = trainer.data_collator([trainer.train_dataset[0]])
pairs = list(zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True))
learned = [token for token, label in pairs if label != -100]  # the label -100: not learned
print("read:", [tokenizer.decode(token) for token, label in pairs if label == -100])
print("learned:", [tokenizer.decode(token) for token in learned])
ends = model.generation_config.eos_token_id  # one, or a list
ends = set(ends if isinstance(ends, list) else [ends])
if not ends & set(learned[-2:]):  # some templates write a line break behind the end token, and it is learned, too
    raise SystemExit("no end token is learned, so the model would never stop: look at the model's chat template")

trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output))
print("peak of torch's memory:", f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB" if gpu else "not known on a CPU")
trainer.save_model(f"{args.output}/adapter")  # of the best checkpoint, with the tokenizer

# ---- judge: every test question, answered with the likeliest token each time, and compared to the letter
model, right = trainer.model.eval(), 0
with open(f"{args.output}/answers.jsonl", "w", encoding="utf-8") as file:
    for chat in data["test"]:
        expected = chat["completion"][0]["content"].strip()
        room = len(tokenizer(expected)["input_ids"]) + 20
        # the template writes the special tokens itself; several questions at once would be padded on the left
        ids = tokenizer.apply_chat_template(
            chat["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**ids, max_new_tokens=room, do_sample=False)[0, ids["input_ids"].shape[1] :]
        answer = tokenizer.decode(output, skip_special_tokens=True).strip()
        right += answer == expected
        row = {"asked": chat["prompt"][-1]["content"], "expected": expected, "answered": answer}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
count = len(data["test"])
print(*(f"{name}: {text}" for name, text in row.items()), sep="\n")
print(f"exact match: {right} of {count}; chance alone may move that by {98 / count**0.5:.0f} points, up or down")
usual = Counter(chat["completion"][0]["content"] for chat in data["train"]).most_common(1)[0][0]
dull = sum(chat["completion"][0]["content"] == usual for chat in data["test"])
print(f"always the most frequent answer: {dull} of {count}")
