"""Made-up evaluation results."""

from pipeline.evaluate import ImageResult, SetResult


def judged(
    psnr: list[float], name: str = "Set5", model: str = "mine", scale: int = 2, bicubic: float = 30
) -> SetResult:
    images = tuple(
        ImageResult(image=f"i{n}", digest=f"d{n}", psnr_y=value, ssim_y=0.9, bicubic_psnr_y=30, bicubic_ssim_y=0.8)
        for n, value in enumerate(psnr)
    )
    means = {"psnr_y": sum(psnr) / len(psnr), "ssim_y": 0.9, "bicubic_psnr_y": 30, "bicubic_ssim_y": 0.8}
    return SetResult(model=model, scale=scale, set=name, images=images, **means)
