"""Do error bars cover what they promise?"""
