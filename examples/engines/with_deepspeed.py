"""Fine-tunes a language model, cut over two ranks, line by line of a text, with DeepSpeed's ZeRO:
torchrun --nproc-per-node 4 examples/engines/with_deepspeed.py MODEL TEXT OUT [STAGE]    # 4: two replicas"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import colrow
from colrow.engines.deepspeed import initialize

folder, text, out, *stage = sys.argv[1:]
mesh = colrow.init_mesh(tp=2, dp=int(os.environ["WORLD_SIZE"]) // 2)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = colrow.load_pretrained(folder, mesh).train()  # each rank reads its parts
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def collate(lines: list[str]) -> dict[str, torch.Tensor]:
    batch = tokenizer(lines, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return {"input_ids": batch.input_ids, "labels": labels}


size = 8 // mesh["dp"].size()  # of a replica
config = {"train_micro_batch_size_per_gpu": size, "gradient_clipping": 0.1}
config["zero_optimization"] = {"stage": int(*stage or [2])}
lines, replicas = Path(text).read_text().splitlines(), mesh["dp"]
engine, _, loader, _ = initialize(model, config, optimizer=optimizer, training_data=lines, collate_fn=collate)
for batch in loader:  # replicas' batches differ, those of a replica's ranks do not
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    loss = engine(**batch).loss * tokens * colrow.token_weight(mesh, tokens)
    engine.backward(loss)
    engine.step()
    torch.distributed.all_reduce(mean := loss.detach() / replicas.size(), group=replicas.get_group())
    if engine.global_rank == 0:
        print("loss", mean.item(), "norm", float(engine.get_global_grad_norm()))
colrow.save_pretrained(engine.module, out)
