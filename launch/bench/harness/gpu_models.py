"""Published models by shape, for what is compiled or timed without their weights."""

from dancemoe_jax.model.config import Latent, ModelConfig, Rope, Routing

MODELS = {
    "mixtral": ModelConfig(
        32000,
        4096,
        32,
        32,
        8,
        128,
        8,
        2,
        14336,
        max_position=4096,
        qk_norm="",
        tie_embeddings=False,
        family="mixtral",
    ),
    "deepseek-v2-lite": ModelConfig(
        102400,
        2048,
        27,
        16,
        16,
        192,
        64,
        6,
        1408,
        shared_expert_size=2816,
        dense_layers=(0,),
        dense_size=10944,
        max_position=4096,
        qk_norm="",
        latent=Latent(512, 128, 64, 128),
        routing=Routing(normalize=False),
        rope=Rope(interleaved=True),
        tie_embeddings=False,
        family="deepseek_v2",
    ),
    "qwen3-30b": ModelConfig(151936, 2048, 48, 32, 4, 128, 128, 8, 768, max_position=4096, tie_embeddings=False),
}
