"""The paper's numbers, from its tables and its text, with the digits that it prints.

From Figures 3, 5 and 6, only the numbers that the text gives are here.
"""

from typing import NamedTuple


class Printed(NamedTuple):
    """A row of Tables 2 to 5, mean ± std over five seeds for RandWire.

    Attributes:
        network: the paper's name of the network.
        accuracies: in %: top-1 and top-5 on ImageNet's validation set, ``""`` if the paper has
            none; in Table 5, box AP, AP50, AP75, APs, APm and APl on COCO val2017.
        flops: multiply-adds, in M (Table 2) or B (Tables 3 and 4).
        params: parameters, in M.
    """

    network: str
    accuracies: tuple[str, ...]
    flops: str = ""
    params: str = ""


# "Small computation regime", 250 epochs.
TABLE_2 = (
    Printed("MobileNet", ("70.6", "89.5"), "569", "4.2"),
    Printed("MobileNet v2", ("74.7", ""), "585", "6.9"),
    Printed("ShuffleNet", ("73.7", "91.5"), "524", "5.4"),
    Printed("ShuffleNet v2", ("74.9", "92.2"), "591", "7.4"),
    Printed("NASNet-A", ("74.0", "91.6"), "564", "5.3"),
    Printed("NASNet-B", ("72.8", "91.3"), "488", "5.3"),
    Printed("NASNet-C", ("72.5", "91.0"), "558", "4.9"),
    Printed("Amoeba-A", ("74.5", "92.0"), "555", "5.1"),
    Printed("Amoeba-B", ("74.0", "91.5"), "555", "5.3"),
    Printed("Amoeba-C", ("75.7", "92.4"), "570", "6.4"),
    Printed("PNAS", ("74.2", "91.9"), "588", "5.1"),
    Printed("DARTS", ("73.1", "91.0"), "595", "4.9"),
    Printed("RandWire-WS, C=78", ("74.7±0.25", "92.2±0.15"), "583±6.2", "5.6±0.1"),
)

# "Regular computation regime", 100 epochs.
TABLE_3 = (
    Printed("ResNet-50", ("77.1", "93.5"), "4.1", "25.6"),
    Printed("ResNeXt-50", ("78.4", "94.0"), "4.2", "25.0"),
    Printed("RandWire-WS, C=109", ("79.0±0.17", "94.4±0.11"), "4.0±0.09", "31.9±0.66"),
    Printed("ResNet-101", ("78.8", "94.4"), "7.8", "44.6"),
    Printed("ResNeXt-101", ("79.5", "94.6"), "8.0", "44.2"),
    Printed("RandWire-WS, C=154", ("80.1±0.19", "94.8±0.18"), "7.9±0.18", "61.5±1.32"),
)

# "Large computation regime": tested on 320×320 images, NAS networks on 331×331.
TABLE_4 = (
    Printed("NASNet-A", ("82.7", "96.2"), "23.8", "88.9"),
    Printed("Amoeba-B", ("82.3", "96.1"), "22.3", "84.0"),
    Printed("Amoeba-A", ("82.8", "96.1"), "23.1", "86.7"),
    Printed("PNASNet-5", ("82.9", "96.2"), "25.0", "86.1"),
    Printed("RandWire-WS, C=154", ("81.6±0.13", "95.6±0.07"), "16.0±0.36", "61.5±1.32"),
)

# "COCO object detection results fine-tuned from the networks in Table 3".
TABLE_5 = (
    Printed("ResNet-50", ("37.1", "58.8", "39.7", "21.9", "40.8", "47.6")),
    Printed("ResNeXt-50", ("38.2", "60.5", "41.3", "23.0", "41.5", "48.8")),
    Printed("RandWire-WS, C=109", ("39.9", "61.9", "43.3", "23.6", "43.5", "52.7")),
    Printed("ResNet-101", ("39.8", "61.7", "43.3", "23.7", "43.9", "51.7")),
    Printed("ResNeXt-101", ("40.7", "62.9", "44.5", "24.4", "44.8", "52.7")),
    Printed("RandWire-WS, C=154", ("41.1", "63.1", "44.6", "24.6", "45.1", "53.0")),
)

# Figure 3: top-1 accuracy in %, for the settings whose numbers §4.1 gives.
FIGURE_3 = {"WS(4, 0.75)": 73.8, "BA(1)": 70.7}
# "The Pearson correlation between any two series" in Figure 6 (§4.1 says Figure 5): the range.
FIGURE_6_PEARSON = (0.91, 0.98)
