"""One look for all of it: gradio's theme and our style sheet, light and dark, no font fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

HERE = Path(__file__).parent / "static"
STYLE = HERE / "style.css"
FAVICON = HERE / "favicon.svg"
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
SAID = "Steer, ablate and explore a language model with sparse autoencoders, live."
HEAD = f"""
<meta name="description" content="{SAID}">
<meta property="og:title" content="saert">
<meta property="og:description" content="{SAID}">
<meta property="og:image" content="">
<meta name="twitter:title" content="saert">
<meta name="twitter:description" content="{SAID}">
<meta name="twitter:image" content="">
<meta name="twitter:creator" content="">
<meta name="color-scheme" content="light dark">
"""


def looks() -> dict[str, Any]:
    """What `gr.Blocks.launch` takes for how the page looks and behaves in a browser."""
    return {
        "theme": theme(),
        "css_paths": [STYLE],
        "js": (HERE / "page.js").read_text("utf-8"),
        "head": HEAD,
        "favicon_path": FAVICON,
        "footer_links": [],
    }


def theme() -> gr.themes.Base:
    """The theme of the app. Every pair of text and ground differs by 4.5:1 or more."""
    base = gr.themes.Base(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate",
        radius_size="md", spacing_size="md", text_size="md", font=SANS, font_mono=MONO,
    )  # fmt: skip
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_800",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_800",
        border_color_primary="*neutral_300",
        border_color_primary_dark="*neutral_700",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_shadow="none",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_label_text_weight="600",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_title_text_weight="600",
        input_background_fill="white",
        input_background_fill_dark="*neutral_950",
        input_border_color="*neutral_500",
        input_border_color_dark="*neutral_500",
        input_border_width="1px",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        link_text_color_hover="*primary_800",
        link_text_color_hover_dark="*primary_200",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_400",
        button_secondary_border_color_dark="*neutral_600",
        button_secondary_text_color="*neutral_800",
        button_secondary_text_color_dark="*neutral_100",
        button_border_width="1px",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        checkbox_background_color_selected="*primary_600",
        checkbox_background_color_selected_dark="*primary_500",
        checkbox_label_text_color_selected="*body_text_color",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
    )
