"""Fine-tunes a language model, cut over two ranks, line by line of a text, with transformers' Trainer:
torchrun --nproc-per-node 4 examples/engines/with_trainer.py MODEL TEXT OUT    # 4: two replicas"""

import os
import sys
from pathlib import Path

from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

import colrow
from colrow.engines.trainer import Trainer

folder, text, out = sys.argv[1:]
mesh = colrow.init_mesh(tp=2, dp=int(os.environ["WORLD_SIZE"]) // 2)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = colrow.load_pretrained(folder, mesh)  # each rank reads its parts
lines = [tokenizer(line).input_ids for line in Path(text).read_text().splitlines()]
arguments = TrainingArguments(
    out,
    per_device_train_batch_size=4 // mesh["dp"].size(),  # of a replica
    gradient_accumulation_steps=2,
    num_train_epochs=1,
    learning_rate=1e-3,
    max_grad_norm=0.1,
    logging_steps=1,
    save_strategy="no",
    use_cpu=mesh.device_type == "cpu",
    report_to="none",
)
trainer = Trainer(
    model,
    arguments,
    data=os.environ.get("DATA", "ddp"),  # or fsdp
    data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads ids and labels
    train_dataset=[{"input_ids": ids, "labels": ids} for ids in lines],
)
trainer.train()
trainer.save_model()
trainer.save_state()  # the loss of each step
