"""The methods that are to come."""

from __future__ import annotations

from fallow.catalogue.entry import Idea

# slug, title, arXiv id, idea, purpose
PLANNED: tuple[tuple[str, str, str, Idea, str], ...] = (
    ("clora", "CLoRA: A Contrastive Approach to Compose Multiple LoRA Models", "2403.19776", "compose",
     "several concept LoRAs in one picture, kept apart by their attention maps while sampling"),
    ("cmlora", "Cached Multi-LoRA Composition for Multi-Concept Image Generation", "2502.04923", "compose",
     "several LoRAs in one picture, one leading at a time, the others from a cache"),
    ("fedsvd", "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", "2505.12805",
     "federated", "LoRA among several data owners under differential privacy"),
    ("graco", "GraCo: Granularity-Controllable Interactive Segmentation", "2405.00587", "recipe",
     "a granularity input for click-based segmentation, without part labels"),
    ("icm-lora", "In-Context Meta LoRA Generation", "2501.17635", "transfer",
     "a generator that writes the LoRA of a task from a few examples of it"),
    ("intruder-dimensions", "LoRA vs Full Fine-tuning: An Illusion of Equivalence", "2410.21228", "analysis",
     "finds the new leading directions that mark forgetting, and scales them down"),
    ("lora-lego", "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise "
     "Clustering", "2409.16167", "compose", "many LoRAs into one of a chosen rank, without data"),
    ("lora-limits", "Computational Limits of Low-Rank Adaptation (LoRA) Fine-Tuning for Transformer Models",
     "2406.03136", "analysis", "tells on which side of the norm threshold each attention head lies"),
    ("loram", "Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models", "2502.13533",
     "compress", "trains on a pruned copy of the base, then runs on the whole one"),
    ("loraprune", "LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", "2305.18403", "compress",
     "prunes heads and channels while LoRA trains, without gradients of the base"),
    ("meteora", "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models", "2405.13053", "compose",
     "all task LoRAs in one model, chosen by a router for each token"),
    ("mugs", "Mugs: A Multi-Granular Self-Supervised Learning Framework", "2203.14415", "recipe",
     "self-supervised pretraining at the level of instance, group and class"),
    ("pela", "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", "2310.10700", "compress",
     "a smaller pretrained model: factorised, then briefly trained to follow the original"),
    ("s-lora", "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", "2311.03285", "serving",
     "one base and many adapters, answered in one batch"),
    ("trans-lora", "Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning", "2405.17258",
     "transfer", "moves a LoRA to another base model without its training data"),
    ("trp", "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", "2004.14566", "compress",
     "trains weights to be low-rank, so that decomposing them costs nearly nothing"),
    ("welore", "From Low Rank Gradient Subspace Stabilization to Low-Rank Weights: Observations, Theories, and "
     "Applications", "2407.11239", "compress",
     "truncates each matrix at its own rank, and fine-tunes the low-rank ones only"),
)  # fmt: skip
