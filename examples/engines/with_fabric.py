"""Fine-tunes a language model, cut over two ranks, line by line of a text, with Lightning Fabric:
torchrun --nproc-per-node 4 examples/engines/with_fabric.py MODEL TEXT OUT    # 4: two replicas"""

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import colrow
from colrow.engines.fabric import Fabric

folder, text, out = sys.argv[1:]
mesh = colrow.init_mesh(tp=2, dp=int(os.environ["WORLD_SIZE"]) // 2)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = colrow.load_pretrained(folder, mesh).train()  # each rank reads its parts
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def collate(lines: list[str]) -> dict[str, torch.Tensor]:
    batch = tokenizer(lines, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return {"input_ids": batch.input_ids, "labels": labels}


fabric = Fabric(mesh, data=os.environ.get("DATA", "ddp"))
model, optimizer = fabric.setup(model, optimizer)
lines = Path(text).read_text().splitlines()
loader = DataLoader(lines, 8 // mesh["dp"].size(), shuffle=True, collate_fn=collate)
for batch in fabric.setup_dataloaders(loader):  # replicas' batches differ, those of a replica's ranks do not
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    loss = model(**batch).loss * tokens * colrow.token_weight(mesh, tokens)  # the mean over all tokens
    fabric.backward(loss)
    norm = fabric.clip_gradients(model, optimizer, max_norm=0.1)
    optimizer.step()
    optimizer.zero_grad()
    fabric.print("loss", fabric.all_reduce(loss.detach()).item(), "norm", norm.item())
colrow.save_pretrained(model, out)
