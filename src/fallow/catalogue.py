"""The catalogue: one card for each method, those that work and those that are planned.

    catalogue.methods()            # all cards, the ready ones first
    catalogue.card("sara").load()  # the class fallow.SaRA

A card says what a method is for, which paper it comes from, what that paper claims and which test holds us to it. The
command line, the documentation and the contract tests are made from the cards, so a method is listed, documented and
tested once its card is here. Nothing but the standard library is imported, and no method before `load()`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Literal, get_args

from fallow.core.errors import ConfigError, nearest

Idea = Literal[
    "selection",  # some entries of the existing weights are trained in place
    "delta",  # a frozen weight is changed by a few trained tensors
    "start and budget",  # how a low-rank delta starts, and which layer gets how much rank
    "update rule",  # what happens between a gradient and a weight
    "objective",  # a term added to the loss
    "full",  # every weight is trained
    "compose", "compress", "transfer", "federated", "serving", "analysis", "recipe",
]  # fmt: skip
Status = Literal["ready", "planned"]


@dataclass(frozen=True)
class Card:
    """What there is to say about one method.

    `slug`: its name on the command line and in files. `title`, `arxiv`: of its paper. `idea`: which of the house's
    ideas it is an instance of. `purpose`: one line. `name`: the public class in `fallow`, "" where the method has none
    of its own. `home`: the module with that class. `defaults`: what it does when nothing is said. `claim`: what its
    paper claims, or what a baseline is there to show. `tested`: the test that checks the claim.

    ConfigError for an idea or a status that does not exist, and for a ready method that lacks its claim or its test.
    """

    slug: str
    title: str
    arxiv: str
    idea: Idea
    purpose: str
    status: Status = "planned"
    name: str = ""
    home: str = ""
    defaults: str = ""
    claim: str = ""
    tested: str = ""

    def __post_init__(self) -> None:
        for field, allowed in (("idea", get_args(Idea)), ("status", get_args(Status))):
            if getattr(self, field) not in allowed:
                said = getattr(self, field)
                raise ConfigError(f"card '{self.slug}': {field}={said!r} does not exist{nearest(said, allowed)}")
        if self.status == "ready" and not (self.claim and self.tested):
            raise ConfigError(f"card '{self.slug}' is ready but lacks claim= or tested=; say what holds, and where")

    @property
    def ready(self) -> bool:
        return self.status == "ready"

    @property
    def link(self) -> str:
        """The address of the paper, "" where there is none."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def load(self) -> Any:
        """Import the method's class. ConfigError where it has none of its own, or is only planned."""
        if not self.home:
            why = "goes through the command line only" if self.ready else "is planned, not written yet"
            raise ConfigError(f"'{self.slug}' has no class to load: it {why}")
        return getattr(import_module(self.home), self.name)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def methods() -> list[Card]:
    """All cards: the ready ones first, each group in alphabetical order of the slugs."""
    return sorted(_CARDS.values(), key=lambda card: (not card.ready, card.slug))


def card(slug: str) -> Card:
    """The card of a method. ConfigError with the nearest name where there is none."""
    if slug not in _CARDS:
        raise ConfigError(f"there is no method '{slug}'{nearest(slug, _CARDS)}; `fallow methods` lists all")
    return _CARDS[slug]


def register(card: Card) -> Card:
    """Add a method of your own; it is then listed and contract-tested like the others. Returns the card.

    ConfigError where the slug is taken by another card.
    """
    if _CARDS.setdefault(card.slug, card) != card:
        raise ConfigError(f"the slug '{card.slug}' is taken by \"{_CARDS[card.slug].title}\"; choose another")
    return card


READY = (
    Card(
        "sara",
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
        "2409.06633",
        "selection",
        "trains the smallest entries of the weights, which the model hardly uses",
        "ready",
        "SaRA",
        "fallow.selection.sara",
        "fraction=0.05, lr=1e-3 * exp(-350 * threshold); `fallow train` adds the paper's rank_weight=5e-3, where a "
        "layer can take it, and reselect_at=0.5",
        "training the entries that matter least learns a new domain and forgets less than training the largest entries "
        "or all of them, with compact gradients in place of dense ones",
        "tests/selection/test_sara.py, tests/selection/test_digits.py",
    ),
    Card(
        "shira",
        "Sparse High Rank Adapters",
        "2406.13175",
        "selection",
        "trains 1-2 % of each matrix under a fixed mask, for adapters that switch fast and blend well",
        "ready",
        "SHiRA",
        "fallow.selection.shira",
        'density=0.02, mask="snip" where batches are given, else "rand", lr=5e-4',
        "a sparse change of LoRA's size has a far higher rank, and adapters switch by writing their entries alone",
        "tests/selection/test_shira.py",
    ),
    Card(
        "lt-sft",
        "Composable Sparse Fine-Tuning for Cross-Lingual Transfer",
        "2110.07560",
        "selection",
        "trains the entries that a short full fine-tuning moves most; SaRA's selective baseline",
        "ready",
        "LTSFT",
        "fallow.selection.lt_sft",
        "fraction=0.05, dense_steps=100, dense_lr=1e-4, lr=5e-4; needs batches=",
        "the entries a dense run moves most, trained from their first values, make sparse changes that can be summed",
        "tests/selection/test_lt_sft.py",
    ),
    Card(
        "largest",
        "Largest entries (an ablation of SaRA)",
        "2409.06633",
        "selection",
        "trains the largest entries of the weights; a baseline that forgets",
        "ready",
        "Largest",
        "fallow.selection.largest",
        "fraction=0.05, lr=5e-4",
        "training the large entries learns as well as SaRA does, and forgets more",
        "tests/selection/test_largest.py, tests/selection/test_digits.py",
    ),
    Card(
        "random",
        "Random entries (an ablation of SaRA)",
        "2409.06633",
        "selection",
        "trains entries drawn by chance; the baseline that every selection must beat",
        "ready",
        "Random",
        "fallow.selection.random",
        "fraction=0.05, lr=5e-4, seed=0",
        "a choice by chance is uniform over all entries and the same on every machine",
        "tests/selection/test_random.py",
    ),
    Card(
        "lora",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "2106.09685",
        "delta",
        "adds a trained low-rank product to each frozen matrix, through PEFT; the usual baseline",
        "ready",
        defaults="rank=8, alpha=rank, on the attention's to_q, to_k, to_v, to_out.0, lr=5e-4",
        claim="trained through PEFT's own LoraConfig, so files are interchangeable with PEFT's",
        tested="tests/recipes",
    ),
    Card(
        "peft",
        "Any method of the PEFT library",
        "",
        "delta",
        "passes any configuration of PEFT through the same recipe: --option peft_type=LOHA",
        "ready",
        defaults="those of the PEFT configuration, on the attention's layers, lr=5e-4; needs peft_type",
        claim="an adapter that is trained here is one that PEFT loads",
        tested="tests/recipes",
    ),
    Card(
        "full",
        "Full fine-tuning",
        "",
        "full",
        "trains every weight with AdamW; the upper bound of memory, and of forgetting",
        "ready",
        defaults="lr=5e-5, weight_decay=0.01",
        claim="what all others are compared with",
        tested="tests/recipes, tests/selection/test_digits.py",
    ),
)

# slug, title, arXiv id, idea, purpose
PLANNED: tuple[tuple[str, str, str, Idea, str], ...] = (
    ("allora", "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", "2410.09692", "update rule",
     "LoRA for short runs on little data: a step size for each row in place of dropout and scaling"),
    ("ba-lora", "BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language "
     "Models", "2408.04556", "objective",
     "three penalties that keep LoRA from amplifying noise and imbalance"),
    ("bone", "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure (first: Bone)",
     "2409.15371", "delta", "one zero-initialised matrix per layer, expanded by sharing: lean and quick to converge"),
    ("clora", "CLoRA: A Contrastive Approach to Compose Multiple LoRA Models", "2403.19776", "compose",
     "several concept LoRAs in one picture, kept apart by their attention maps while sampling"),
    ("cmlora", "Cached Multi-LoRA Composition for Multi-Concept Image Generation", "2502.04923", "compose",
     "several LoRAs in one picture, one leading at a time, the others from a cache"),
    ("codyra", "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models "
     "with Dynamic Rank-Selective LoRA", "2412.01004", "start and budget",
     "one task after another at the least rank, without replay"),
    ("colora", "Contribution-based Low-Rank Adaptation with Pre-training Model for Real Image Restoration",
     "2408.01099", "start and budget", "image restoration: rank where a degradation needs it"),
    ("corda", "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware "
     "Parameter-Efficient Fine-tuning", "2406.05223", "start and budget",
     "a start from weights seen through their inputs: keep knowledge, or learn the task first"),
    ("dct-adamw", "Trion: FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of LLMs",
     "2505.17967", "update rule", "low-rank optimizer states in a fixed cosine basis: no SVD, no stored projector"),
    ("diffora", "DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation",
     "2502.08905", "start and budget", "a differentiable search for the modules that deserve an adapter"),
    ("dylora", "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation",
     "2210.07558", "delta", "one LoRA that can be cut to any rank of a range after training"),
    ("eva", "Parameter Efficient Fine-tuning via Explained Variance Adaptation", "2410.07170", "start and budget",
     "LoRA starts on the directions in which a layer's inputs vary most, and rank follows them"),
    ("fedsvd", "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", "2505.12805",
     "federated", "LoRA among several data owners under differential privacy"),
    ("fira", "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", "2410.01623",
     "update rule", "full-rank updates at the memory of low-rank states"),
    ("frugal", "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training", "2411.07837",
     "update rule", "a share of the gradient gets Adam's states, the rest a rule without any"),
    ("galore", "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", "2403.03507", "update rule",
     "Adam's moments of a low-rank projection of each gradient"),
    ("graco", "GraCo: Granularity-Controllable Interactive Segmentation", "2405.00587", "recipe",
     "a granularity input for click-based segmentation, without part labels"),
    ("gradnormlorp", "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training", "2412.19616",
     "update rule", "weight normalisation, a low-rank update and low-rank gradients together"),
    ("hydra", "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", "2309.06922", "delta",
     "a parallel and a sequential low-rank branch on each layer"),
    ("icm-lora", "In-Context Meta LoRA Generation", "2501.17635", "transfer",
     "a generator that writes the LoRA of a task from a few examples of it"),
    ("increlora", "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
     "2308.12043", "start and budget", "every module starts at rank 1 and grows where it matters"),
    ("intruder-dimensions", "LoRA vs Full Fine-tuning: An Illusion of Equivalence", "2410.21228", "analysis",
     "finds the new leading directions that mark forgetting, and scales them down"),
    ("kasa", "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", "2412.06071", "delta",
     "cleans the base of its smallest directions and learns an update in SVD form"),
    ("lamda", "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", "2406.12832",
     "delta", "a small core between two spectral projections: fewer parameters, fewer activations"),
    ("lisa", "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
     "2403.17919", "update rule", "a few random blocks are trained at a time, changed every so many steps"),
    ("loca", "LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning", "2502.06820", "delta",
     "the update is a few cosine components, whose places are trained too"),
    ("loku", "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", "2408.06621", "objective",
     "forgets a given set with a bounded loss, from a start that points at it"),
    ("loldu", "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
     "2410.13618", "delta", "r + 1 numbers per layer between the factors of an LU decomposition"),
    ("lora-ga", "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", "2407.05000", "start and budget",
     "LoRA starts so that its first update points along the full gradient"),
    ("lora-ggpo", "LoRA-MGPO: Mitigating Double Descent in Low-Rank Adaptation via Momentum-Guided Perturbation "
     "Optimization (first: LoRA-GGPO)", "2502.14538", "update rule",
     "gradients at slightly perturbed weights, to prefer flat regions"),
    ("lora-lego", "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes Through Rank-Wise "
     "Clustering", "2409.16167", "compose", "many LoRAs into one of a chosen rank, without data"),
    ("lora-limits", "Computational Limits of Low-Rank Adaptation (LoRA) Fine-Tuning for Transformer Models",
     "2406.03136", "analysis", "tells on which side of the norm threshold each attention head lies"),
    ("lora-pro", "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", "2407.18242", "update rule",
     "gradients of A and B that move W as close as possible to the full gradient"),
    ("lora-sb", "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank "
     "Fine-Tuning", "2411.19557", "start and budget",
     "r * r numbers per layer, started from an approximation of the first full update"),
    ("loram", "Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models", "2502.13533",
     "compress", "trains on a pruned copy of the base, then runs on the whole one"),
    ("loraprune", "LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", "2305.18403", "compress",
     "prunes heads and channels while LoRA trains, without gradients of the base"),
    ("meteora", "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models", "2405.13053", "compose",
     "all task LoRAs in one model, chosen by a router for each token"),
    ("mos", "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards", "2410.00938",
     "delta", "all layers draw their low-rank vectors from one pool of shards"),
    ("mosa", "Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training (first: MoSA)",
     "2312.02923", "delta", "an adapter split into disjoint sparse experts while training, merged after"),
    ("mugs", "Mugs: A Multi-Granular Self-Supervised Learning Framework", "2203.14415", "recipe",
     "self-supervised pretraining at the level of instance, group and class"),
    ("nola", "NOLA: Compressing LoRA using Linear Combination of Random Basis", "2310.02556", "delta",
     "an adapter of any size: coefficients of random bases, and a seed"),
    ("pego", "Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization for Domain "
     "Generalization", "2407.15085", "objective",
     "a group of LoRAs kept orthogonal to the base and to each other, for unseen domains"),
    ("pela", "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", "2310.10700", "compress",
     "a smaller pretrained model: factorised, then briefly trained to follow the original"),
    ("petalface", "PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition",
     "2412.07771", "delta", "two LoRAs blended by the quality of each input"),
    ("randlora", "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", "2502.00987", "delta",
     "full-rank updates from fixed random bases with trained coefficients"),
    ("s-lora", "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", "2311.03285", "serving",
     "one base and many adapters, answered in one batch"),
    ("salt", "SALT: Parameter-Efficient Fine-Tuning via Singular Value Adaptation with Low-Rank Transformation",
     "2503.16055", "delta", "scales the large singular values, adds a low rank to the rest; for segmentation"),
    ("sltrain", "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
     "2406.02214", "delta", "pretraining with every weight as low rank plus a fixed sparse support"),
    ("smora", "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
     "2501.15103", "delta", "every rank of one LoRA is an expert; a few are active for each token"),
    ("sora", "Sparse Low-rank Adaptation of Pre-trained Language Models", "2311.11696", "start and budget",
     "starts with more rank than needed; gates fall to exact zero and are cut out"),
    ("svfit", "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
     "2409.05926", "delta", "one short vector of singular values per layer"),
    ("tlora", "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models",
     "2501.08727", "delta", "a cheap full-rank transform of the weight, then a tiny residual"),
    ("trans-lora", "Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning", "2405.17258",
     "transfer", "moves a LoRA to another base model without its training data"),
    ("trp", "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", "2004.14566", "compress",
     "trains weights to be low-rank, so that decomposing them costs nearly nothing"),
    ("wara", "WaRA: Wavelet Low Rank Adaptation", "2506.24092", "delta",
     "half-size factors in a wavelet domain"),
    ("welore", "From Low Rank Gradient Subspace Stabilization to Low-Rank Weights: Observations, Theories, and "
     "Applications", "2407.11239", "compress",
     "truncates each matrix at its own rank, and fine-tunes the low-rank ones only"),
)  # fmt: skip

_CARDS = {card.slug: card for card in (*READY, *(Card(*facts) for facts in PLANNED))}
