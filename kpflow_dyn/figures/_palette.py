"""The colours of lines, for readers of all kinds of colour vision (Okabe and Ito), on light pages and on dark ones."""

SERIES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]
DARK_SERIES = ["#56B4E9", "#E69F00", "#2CC295", "#E39BC4"]
MORE = ["#8C6D31", "#7B61A8", "#4D4D4D", "#A63A50"]  # further lines, where a page needs them
DARK_MORE = ["#D9B96B", "#B9A3E3", "#BDBDBD", "#F08A9E"]
