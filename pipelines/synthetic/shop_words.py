"""The words of the titles of `looks_catalogue`: kinds of products as a shop would print them.

None of them is a word for a colour, a pattern or a proportion: a title says nothing about looks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of product: how its outline is drawn, and the words of its titles. Its makers make nothing else."""

    name: str
    form: str  # of `looks_catalogue.FORMS`; other kinds share it, so that only the title tells them apart
    nouns: tuple[str, ...]
    makers: tuple[str, ...]
    materials: tuple[str, ...]
    features: tuple[str, ...]
    sizes: tuple[str, ...]


KINDS = (
    Kind(
        "grocery tote",
        "bag",
        ("Grocery Tote", "Shopping Bag", "Market Tote"),
        ("Barrow & Lane", "Corner Grocer Co.", "Pantry Post"),
        ("Organic Cotton", "Recycled Canvas", "Jute", "Heavy Linen"),
        ("with Inner Pocket", "Foldable", "Machine Washable", "with Reinforced Handles", "Holds 20 kg"),
        ("Standard", "Family Size", "Pack of 2", "15 L"),
    ),
    Kind(
        "water bottle",
        "bottle",
        ("Water Bottle", "Sports Bottle", "Insulated Hiking Bottle"),
        ("Tarn Outdoor", "Hydrel", "Summit & Stream"),
        ("Stainless Steel", "Tritan", "Vacuum Steel", "Aluminium"),
        ("Leakproof", "with Straw Lid", "Keeps Drinks Cold for 24 Hours", "with Carry Loop", "BPA Free"),
        ("500 ml", "750 ml", "1 Litre", "350 ml"),
    ),
    Kind(
        "loose leaf tea",
        "tin",
        ("Loose Leaf Tea", "Breakfast Tea", "Earl Grey Tea"),
        ("Harrowgate Tea Merchants", "Ceylon House", "Leaf & Kettle"),
        ("Assam", "Darjeeling", "Ceylon", "Yunnan"),
        ("Single Estate", "Fair Trade", "with Bergamot", "Caffeine Free", "Hand Picked"),
        ("100 g", "250 g", "50 g", "500 g"),
    ),
    Kind(
        "running shirt",
        "shirt",
        ("Running Shirt", "Training T-Shirt", "Marathon Tee"),
        ("Strideworks", "Paceline", "Kilometre Club"),
        ("Polyester Mesh", "Merino Blend", "Recycled Polyester", "Quick-Dry Knit"),
        ("Moisture Wicking", "with Reflective Trim", "Lightweight", "Anti-Odour", "with UV Protection"),
        ("S", "M", "L", "XL"),
    ),
    Kind(
        "trail running shoe",
        "shoe",
        ("Trail Running Shoe", "Mountain Running Shoe", "Fell Runner"),
        ("Scree Athletics", "Rocktrail", "Alpine Runner"),
        ("Ripstop Mesh", "Waterproof Membrane", "Synthetic Upper", "Knit Upper"),
        ("with Grippy Outsole", "with Rock Plate", "Cushioned", "Lightweight", "with Toe Guard"),
        ("EU 39", "EU 41", "EU 43", "EU 45"),
    ),
    Kind(
        "sofa cushion",
        "cushion",
        ("Sofa Cushion", "Throw Pillow", "Couch Pillow"),
        ("Hearth & Hall", "Loungewell", "Parlour Home"),
        ("Velvet", "Linen", "Brushed Cotton", "Boucle"),
        ("with Hidden Zip", "Feather Filled", "with Removable Cover", "Hypoallergenic", "Set of 2"),
        ("40 x 40 cm", "45 x 45 cm", "50 x 50 cm", "60 x 60 cm"),
    ),
    Kind(
        "coffee mug",
        "mug",
        ("Coffee Mug", "Breakfast Mug", "Espresso Cup"),
        ("Kiln & Clay", "Morning Pour", "Stoneware Studio"),
        ("Stoneware", "Porcelain", "Bone China", "Glazed Ceramic"),
        ("Dishwasher Safe", "Microwave Safe", "Hand Thrown", "with Large Handle", "Gift Boxed"),
        ("300 ml", "350 ml", "450 ml", "80 ml"),
    ),
    Kind(
        "hardcover notebook",
        "book",
        ("Hardcover Notebook", "Writing Journal", "Bullet Journal"),
        ("Inkwell Paper", "Foolscap & Sons", "Margin Stationers"),
        ("Acid-Free Paper", "120 gsm Paper", "Recycled Paper", "Fountain Pen Paper"),
        ("with Ribbon Marker", "Thread Bound", "with Elastic Band", "Numbered Pages", "Lies Flat"),
        ("A5", "A4", "A6", "B5"),
    ),
    Kind(
        "gym duffel",
        "bag",
        ("Gym Duffel", "Sports Holdall", "Workout Bag"),
        ("Ironhall", "Locker Room Supply", "Repset"),
        ("Ripstop Nylon", "Coated Polyester", "Tarpaulin", "Cordura"),
        ("with Shoe Compartment", "with Wet Pocket", "Water Resistant", "with Shoulder Strap", "Lockable Zips"),
        ("30 L", "40 L", "25 L", "55 L"),
    ),
    Kind(
        "shampoo",
        "bottle",
        ("Shampoo", "Daily Shampoo", "Moisturising Shampoo"),
        ("Fennel Apothecary", "Lather & Co.", "Sulis Hair Care"),
        ("Argan Oil", "Aloe Vera", "Rosemary", "Coconut Milk"),
        ("for Dry Hair", "for Fine Hair", "Sulphate Free", "for Sensitive Scalps", "Vegan"),
        ("250 ml", "400 ml", "500 ml Refill", "Travel Size 75 ml"),
    ),
    Kind(
        "ground coffee",
        "tin",
        ("Ground Coffee", "Filter Coffee", "Espresso Grind Coffee"),
        ("Portside Roasters", "Altura Coffee", "Second Crack"),
        ("Arabica", "Ethiopian Arabica", "Colombian Arabica", "Robusta Blend"),
        ("Small Batch Roast", "Decaffeinated", "with Notes of Cocoa", "Low Acid", "Rainforest Certified"),
        ("227 g", "340 g", "454 g", "1 kg"),
    ),
    Kind(
        "pyjama top",
        "shirt",
        ("Pyjama Top", "Sleep Shirt", "Nightshirt"),
        ("Drowse", "Bedfordshire Nightwear", "Slumber & Sons"),
        ("Bamboo Viscose", "Brushed Flannel", "Satin", "Cotton Jersey"),
        ("with Chest Pocket", "Tagless", "Extra Soft", "for Hot Sleepers", "Button Front"),
        ("Small", "Medium", "Large", "Extra Large"),
    ),
    Kind(
        "house slipper",
        "shoe",
        ("House Slipper", "Indoor Shoe", "Winter Slipper"),
        ("Hygge Feet", "Fireside Footwear", "Wooltide"),
        ("Boiled Wool", "Sheepskin", "Memory Foam", "Felt"),
        ("with Non-Slip Sole", "Fleece Lined", "Washable", "Slip-On", "with Arch Support"),
        ("UK 4", "UK 6", "UK 8", "UK 10"),
    ),
    Kind(
        "dog bed",
        "cushion",
        ("Dog Bed", "Pet Mattress", "Puppy Bed"),
        ("Bramble & Paw", "Kennelworth", "Old Hound"),
        ("Orthopaedic Foam", "Faux Fur", "Chew-Proof Oxford Cloth", "Corduroy"),
        ("with Washable Cover", "for Senior Dogs", "Calming", "with Waterproof Liner", "Crate Friendly"),
        ("for Small Breeds", "for Medium Breeds", "for Large Breeds", "for Puppies"),
    ),
    Kind(
        "plant pot",
        "mug",
        ("Plant Pot", "Herb Planter", "Succulent Pot"),
        ("Potting Shed", "Fern & Fig", "Windowsill Garden Co."),
        ("Terracotta", "Fibre Clay", "Glazed Earthenware", "Recycled Resin"),
        ("with Drainage Hole", "with Saucer", "Frost Proof", "Self Watering", "for Indoor Plants"),
        ("10 cm", "14 cm", "18 cm", "22 cm"),
    ),
    Kind(
        "photo album",
        "book",
        ("Photo Album", "Wedding Album", "Family Photo Book"),
        ("Keepsake Bindery", "Album & Attic", "Heirloom Press"),
        ("Acid-Free Card", "Bonded Leather", "Linen Bound", "Archival Paper"),
        ("Holds 200 Photos", "Self-Adhesive", "with Slip-In Pockets", "with Memo Lines", "Holds 500 Photos"),
        ("10 x 15 cm Prints", "13 x 18 cm Prints", "60 Pages", "100 Pages"),
    ),
    Kind(
        "laptop bag",
        "bag",
        ("Laptop Bag", "Notebook Computer Case", "Office Briefcase"),
        ("Commuter Works", "Deskbound", "Meridian Carry"),
        ("Full Grain Leather", "Ballistic Nylon", "Neoprene", "Waxed Canvas"),
        ("with Padded Sleeve", "with Trolley Strap", "with USB Port", "Anti-Theft", "with Organiser Panel"),
        ("13 Inch", "14 Inch", "15.6 Inch", "17 Inch"),
    ),
    Kind(
        "olive oil",
        "bottle",
        ("Extra Virgin Olive Oil", "Cold Pressed Olive Oil", "Cooking Olive Oil"),
        ("Frantoio Bellini", "Kalamata Groves", "Casa del Olivo"),
        ("Picual", "Arbequina", "Koroneiki", "Leccino"),
        ("First Harvest", "Unfiltered", "with Pouring Spout", "Organic", "Peppery Finish"),
        ("250 ml Glass", "500 ml Glass", "750 ml Glass", "1 L Glass"),
    ),
    Kind(
        "scented candle",
        "tin",
        ("Scented Candle", "Aromatherapy Candle", "Wax Candle in a Tin"),
        ("Wick & Wander", "Evenglow", "Taper & Thyme"),
        ("Soy Wax", "Beeswax", "Coconut Wax", "Rapeseed Wax"),
        ("Sandalwood", "Fig and Cedar", "Fresh Linen Scent", "Sea Salt", "Vanilla and Tonka"),
        ("20 Hours", "30 Hours", "45 Hours", "60 Hours"),
    ),
    Kind(
        "work shirt",
        "shirt",
        ("Work Shirt", "Mechanic's Shirt", "Utility Overshirt"),
        ("Foundry Workwear", "Tool & Timber", "Site Standard"),
        ("Heavy Twill", "Ripstop Cotton", "Poly-Cotton", "Brushed Drill"),
        ("with Pen Pocket", "Flame Resistant", "Triple Stitched", "Stain Resistant", "with Snap Buttons"),
        ("Chest 96 cm", "Chest 102 cm", "Chest 108 cm", "Chest 116 cm"),
    ),
    Kind(
        "school trainer",
        "shoe",
        ("School Trainer", "Kids' Sneaker", "Children's Gym Shoe"),
        ("Playground Shoes", "Little Laces", "Hopscotch Footwear"),
        ("Canvas", "Coated Leather", "Breathable Mesh", "Vegan Suede"),
        ("with Touch Fastening", "with Elastic Laces", "Non-Marking Sole", "Machine Washable", "Scuff Proof"),
        ("Child 10", "Child 12", "Youth 1", "Youth 3"),
    ),
    Kind(
        "camping pillow",
        "cushion",
        ("Camping Pillow", "Travel Pillow", "Backpacking Pillow"),
        ("Bivouac Gear", "Tentside", "Nomad Rest"),
        ("Inflatable TPU", "Compressible Foam", "Synthetic Down", "Stretch Polyester"),
        ("Packs into Its Own Sack", "with Neck Support", "Ultralight 80 g", "Washable", "Non-Slip Backing"),
        ("Adult", "Junior", "Pack of 2", "Pack of 4"),
    ),
    Kind(
        "beer stein",
        "mug",
        ("Beer Stein", "Ale Tankard", "Pint Mug"),
        ("Brauhaus Glashütte", "Taproom Traders", "Oaken Barrel Goods"),
        ("Pewter", "Salt-Glazed Stoneware", "Thick Glass", "Double-Walled Steel"),
        ("with Hinged Lid", "Freezer Safe", "for Home Brewers", "Engravable", "Father's Day Gift"),
        ("0.5 L", "1 L", "570 ml", "Set of 4"),
    ),
    Kind(
        "recipe binder",
        "book",
        ("Recipe Binder", "Cookbook Folder", "Kitchen Recipe Organiser"),
        ("Whisk & Write", "Granny's Kitchen Press", "Sunday Roast Stationery"),
        ("Wipe-Clean Laminate", "Stiff Board", "Splash-Proof Cover", "Kraft Card"),
        ("with Tab Dividers", "with 50 Recipe Cards", "Ring Bound", "with Conversion Chart", "with Plastic Sleeves"),
        ("Half Letter", "Full Page", "Three Ring", "Four Ring"),
    ),
)
