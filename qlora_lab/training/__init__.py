"""Teach a model: from lines of a file to an adapter.

settings.py      TrainSettings: what can be wrong about a run is said when they are made
presets.py       recipes by name, down to the one that needs the least memory
data.py          data wherever it is: found, read a sample at a time, checked
rows.py          a file's rows: JSON lines, an array, text, a table; packed or not
tables.py        rows of CSV, Parquet and data sets of 🤗 datasets
formats.py       a row in any of people's formats -> a chat
holding_out.py   which samples of a file without splits are held out, and how many
cleaning.py      a file's rows without what should not be trained on, as a file or as splits
rendering.py     a chat as a template writes it, in whatever form the template wants it
templates.py     what a chat template makes of a chat, and which of it are the assistant's own words
chat.py          chats -> token ids, and which of them are learned
picture.py       a sample token by token, in plain text
likeness.py      what occurs twice, and what of the judged samples is among the trained ones
vocabulary.py    tokens a word, by script
data_report.py   what is in a data set, before anything is trained on it
batches.py       a seeded stream of steps, bucketed or packed; and the tensors that a model takes
loop.py          the training loop
steps/           how one optimizer step is taken
loss.py          the loss of a batch, at once or in chunks
optimizers.py    AdamW by transformers' names
schedules.py     the learning rate over a run
activations.py   less of what autograd keeps, or elsewhere
processes.py     several processes: who we are, and sums over all
sharding.py      trained parameters of which each process has a part
checkpoints.py   a run goes on from here, bit for bit; no pickle
interrupts.py    Ctrl-C
step_records.py  what each step leaves behind, and the one definition of tokens a second
step_log.py      a line for each step, while it runs
tracking.py      the same for TensorBoard, Trackio or wandb
validation.py    the loss on held-out samples, the best adapter so far, when to stop early
run_folder.py    the folder of a run: is it free, what does it hold
"""
