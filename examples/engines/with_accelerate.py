"""Fine-tunes a language model, cut over two ranks, line by line of a text, with Hugging Face accelerate:
torchrun --nproc-per-node 4 examples/engines/with_accelerate.py MODEL TEXT OUT    # 4: two replicas"""

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import colrow
from colrow.engines.accelerate import Accelerator

folder, text, out = sys.argv[1:]
mesh = colrow.init_mesh(tp=2, dp=int(os.environ["WORLD_SIZE"]) // 2)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = colrow.load_pretrained(folder, mesh).train()  # each rank reads its parts
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def collate(lines: list[str]) -> dict[str, torch.Tensor]:
    batch = tokenizer(lines, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return {"input_ids": batch.input_ids, "labels": labels}


lines, order = Path(text).read_text().splitlines(), torch.Generator().manual_seed(0)
loader = DataLoader(lines, 8 // mesh["dp"].size(), shuffle=True, generator=order, collate_fn=collate)
accelerator = Accelerator(mesh, data=os.environ.get("DATA", "ddp"))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:  # replicas' batches differ, those of one replica's ranks do not
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    loss = model(**batch).loss * tokens * colrow.token_weight(mesh, tokens)  # the mean over all tokens
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print("loss", accelerator.reduce(loss, "mean").item(), "norm", norm.item())
accelerator.save_model(model, out)
